// What the panels say, in the languages of the page. No side effects.
import { app } from "../../../scripts/app.js";

// English, which is the key: simplified Chinese, Korean
const WORDS = {
    // light ball
    "Direction of the light": ["光的方向", "빛의 방향"],
    "Drag to aim, beyond the rim to go behind. Wheel: intensity. Shift and drag: softness.": [
        "拖动以瞄准，拖出边缘则到背后。滚轮：强度。按住 Shift 拖动：柔和度。",
        "끌어서 조준하고, 테두리를 넘으면 뒤쪽입니다. 휠: 세기. Shift+끌기: 부드러움.",
    ],
    "Ambient: light from everywhere": ["环境光：来自四面八方的光", "주변광: 사방에서 오는 빛"],
    "ball": ["球", "공"],
    "head": ["头像", "얼굴"],
    "Show a grey ball": ["显示灰球", "회색 공 보기"],
    "Show the head of the photo": ["显示照片中的头部", "사진의 머리 보기"],
    "preset": ["预设", "프리셋"],
    "Lights by name": ["按名称选光", "이름으로 고르는 조명"],
    "Colour of the lamp": ["灯光颜色", "조명 색"],
    "Colour: {name}": ["颜色：{name}", "색: {name}"],
    "{n} degrees left": ["左 {n} 度", "왼쪽 {n}도"],
    "{n} degrees right": ["右 {n} 度", "오른쪽 {n}도"],
    "{n} degrees above": ["上 {n} 度", "위 {n}도"],
    "{n} degrees below": ["下 {n} 度", "아래 {n}도"],
    // orbit
    "Play the orbit": ["播放环绕", "궤도 재생"],
    "Pause": ["暂停", "일시 정지"],
    "Frame of the orbit": ["环绕的帧", "궤도의 프레임"],
    "Hard or soft": ["硬光或柔光", "강한 빛과 부드러운 빛"],
    // lights
    "rembrandt": ["伦勃朗光", "렘브란트"],
    "butterfly": ["蝴蝶光", "버터플라이"],
    "split left": ["左侧分割光", "왼쪽 분할광"],
    "split right": ["右侧分割光", "오른쪽 분할광"],
    "rim": ["轮廓光", "림 라이트"],
    "overcast": ["阴天", "흐린 날"],
    "golden hour": ["黄金时刻", "골든 아워"],
    "candle from below": ["下方烛光", "아래쪽 촛불"],
    "bare bulb": ["裸灯", "알전구"],
    "window": ["窗光", "창가 빛"],
    "softbox": ["柔光箱", "소프트박스"],
    "hazy sky": ["薄云天空", "옅은 구름"],
    // colours
    "candle": ["烛光", "촛불"],
    "tungsten": ["钨丝灯", "텅스텐"],
    "white": ["白色", "흰색"],
    "shade": ["阴影处", "그늘"],
    "blue hour": ["蓝调时刻", "블루 아워"],
    // head
    "Turn of the head": ["头部转动", "머리 돌리기"],
    "Drag to turn the head. Shift and drag: tilt. Alt and drag: eyes. Double click: back to the photo.": [
        "拖动以转动头部。按住 Shift 拖动：倾斜。按住 Alt 拖动：眼睛。双击：恢复照片原样。",
        "끌어서 머리를 돌립니다. Shift+끌기: 기울이기. Alt+끌기: 눈. 두 번 클릭: 사진 그대로.",
    ],
    "All sliders to 0": ["所有滑块归零", "모든 값을 0으로"],
    "The photo's own expression": ["照片原本的表情", "사진의 원래 표정"],
    "Expression: {name}, added to the photo's own": [
        "表情：{name}，叠加在照片原本的表情上",
        "표정: {name}, 사진의 표정에 더해집니다",
    ],
    "This head has pose and jaw only": ["此头部模型只有姿态和下颌", "이 머리에는 자세와 턱만 있습니다"],
    "Result": ["结果", "결과"],
    "Run once to see the face": ["运行一次即可看到人脸", "한 번 실행하면 얼굴이 보입니다"],
    "{n} degrees up": ["上 {n} 度", "위로 {n}도"],
    "{n} degrees down": ["下 {n} 度", "아래로 {n}도"],
    "tilted {n} degrees": ["倾斜 {n} 度", "{n}도 기울임"],
    // expressions
    "photo": ["原样", "원본"],
    "smile": ["微笑", "미소"],
    "laugh": ["大笑", "웃음"],
    "surprised": ["惊讶", "놀람"],
    "sad": ["悲伤", "슬픔"],
    "angry": ["生气", "화남"],
    "kiss": ["亲吻", "뽀뽀"],
};
const LANGUAGES = ["zh", "ko"];

/** An English text in a language, {names} filled in: English where there is no other. */
export function translate(text, language, names = {}) {
    const words = WORDS[text]?.[LANGUAGES.indexOf(language)] ?? text;
    return words.replace(/\{(\w+)\}/g, (_, name) => names[name]);
}

/** The same in the page's language; the page draws its nodes anew when that changes. */
export function say(text, names) {
    return translate(text, app.extensionManager?.setting?.get("Comfy.Locale"), names);
}
